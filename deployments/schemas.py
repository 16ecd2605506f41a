"""What travels: request bodies over HTTP, and score queries between replicas.

Bodies are checked by pydantic and refuse unknown fields by name. What crosses a handle is
a named tuple of plain values: a pydantic object costs ten times as much to pickle.
"""

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcore.errors import InvalidFieldError

Mode = Literal["EXACT", "PARTIAL", "FALLBACK", "UNAVAILABLE"]

Body = TypeVar("Body", bound=BaseModel)


class ScoreRequest(BaseModel):
    """Body of ``POST /score_completions``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    model: str | None = None
    lora_name: str | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    pods: list[str] | None = None  # score only these


class TokenizeOptions(BaseModel):
    """What ``POST /tokenize`` takes beside a chat, which the renderer checks."""

    model_config = ConfigDict(extra="ignore", strict=True)

    return_token_strs: bool | None = None


class TokenizeRequest(TokenizeOptions):
    """Body of ``POST /tokenize`` with a prompt, as vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class CompletionRequest(BaseModel):
    """The fields of ``POST /v1/completions`` that decide what is scored and where it goes."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str | list[Any]
    model: str | None = None
    stream: bool = False
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    # With these an engine computes another prompt.
    prompt_embeds: Any = None
    suffix: Any = None
    truncate_prompt_tokens: Any = None

    def single_prompt(self) -> str | list[int]:
        """Return the one prompt: text or token ids.

        Raises:
            InvalidFieldError: Empty, several prompts, or neither text nor ids; or a field
                that changes it.
        """
        for field in ("prompt_embeds", "suffix", "truncate_prompt_tokens"):
            if getattr(self, field) is not None:
                raise InvalidFieldError(field, "changes the prompt, which is not supported")
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise InvalidFieldError(
                    "prompt", "send one prompt per request, each is routed alone"
                )
            prompt = prompt[0]
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not prompt or not (isinstance(prompt, str) or is_ids):
            raise InvalidFieldError("prompt", "must be a non-empty text or list of token ids")
        return prompt


def parse(schema: type[Body], body: dict[str, Any]) -> Body:
    """Check a body.

    Raises:
        InvalidFieldError: Naming the first wrong or unknown field.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        names = [str(part) for part in first["loc"] if part in body or isinstance(part, int)]
        param = ".".join(names) or str(first["loc"][0])
        raise InvalidFieldError(param, first["msg"]) from error


class ScoreQuery(NamedTuple):
    """One prompt on its way to the indexer."""

    tokens: bytes  # uint32, machine byte order: the cheapest thing to carry over a handle
    model: str
    request_id: str
    lora: str | None = None
    salt: str | None = None
    pods: tuple[str, ...] | None = None
    prompt: str | None = None  # set: publish as a scored prompt
    chat: dict[str, Any] | None = None  # set: publish as a chat request


class RankScore(NamedTuple):
    """One data-parallel rank of one pod against one prompt (``kvcore.scorer.PodScore``).

    Declared here as well, so that a replica that only reads scores does not load numba.
    """

    pod: str
    rank: int
    blocks: int
    score: float
    tiers: dict[str, int]  # of those blocks, how many each tier holds


class ScoreAnswer(NamedTuple):
    """What the indexer knows about one prompt."""

    scores: list[RankScore]  # best first; pods without a block are absent
    cached_tokens: dict[str, int]  # what each pod would report as cached for this prompt
    mode: Mode
    reason: str | None
    n_tokens: int
    n_blocks: int
    block_size: int
    pods_version: int  # changes when a pod is added or removed

    def pod_scores(self) -> dict[str, int | float]:
        """Return the best score of each pod over its ranks; whole numbers as ints."""
        best: dict[str, float] = {}
        for score in self.scores:
            best[score.pod] = max(best.get(score.pod, 0.0), score.score)
        return {pod: int(s) if s == int(s) else round(s, 4) for pod, s in best.items()}
