"""The tour of a running service (placeholder until written)."""


def main(url: str, events: str) -> int:
    """Walk through the service at ``url``."""
    raise NotImplementedError
