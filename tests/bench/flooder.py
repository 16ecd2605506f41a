"""An engine that publishes 64-block events, in a process that loads nothing else.

``python -m tests.bench.flooder ENDPOINT RATE SECONDS``; rate 0 is as fast as possible.
"""

import random
import struct
import sys
import time

import msgpack
import zmq

BLOCKS, BLOCK_SIZE = 64, 16


def make(n: int, seed: int, vocabulary: int) -> list[bytes]:
    """Return the payloads of ``n`` prefills in the shape of vLLM 0.32."""
    chance = random.Random(seed)
    return [
        bytes(
            msgpack.packb(
                [
                    1.0 + number,
                    [
                        {
                            "type": "BlockStored",
                            "block_hashes": [chance.getrandbits(64) for _ in range(BLOCKS)],
                            "parent_block_hash": None,
                            "token_ids": [
                                chance.randrange(vocabulary) for _ in range(BLOCKS * BLOCK_SIZE)
                            ],
                            "block_size": BLOCK_SIZE,
                            "lora_id": None,
                            "medium": "GPU",
                            "lora_name": None,
                            "extra_keys": [None] * BLOCKS,
                            "group_idx": 0,
                            "kv_cache_spec_kind": "full_attention",
                        }
                    ],
                    0,
                ]
            )
            or b""
        )
        for number in range(n)
    ]


def flood(endpoint: str, rate: float, seconds: float) -> None:
    """Publish for some time once somebody listens."""
    rests = [payload[10:] for payload in make(500, 1, 150_000)]
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.set(zmq.SNDHWM, 10_000)
    socket.set(zmq.LINGER, 0)
    socket.bind(endpoint)
    socket.recv()
    start, seq = time.time(), 0
    while (now := time.time()) < start + seconds:
        if rate and seq > (now - start) * rate:
            time.sleep(0.0005)
            continue
        payload = b"\x93\xcb" + struct.pack(">d", now) + rests[seq % len(rests)]
        socket.send_multipart([b"kv@pod-a@m", seq.to_bytes(8, "big"), payload])
        seq += 1
    context.destroy(linger=0)


if __name__ == "__main__":
    flood(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
