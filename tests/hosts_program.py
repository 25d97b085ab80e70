"""One process of a run, for the tests of several: `mode coordinator count index timeout`."""

import logging
import os
import sys
import time

from atlas_jax import hosts, roll_call
from atlas_jax.config import RunConfig
from atlas_jax.errors import UserError

mode, coordinator, count, index, timeout = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
sys.argv = ["atlas", "train", "--process_id", str(index)]
roll_call.LEAST_SILENCE = 2.0
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("jax").setLevel(logging.ERROR)
if mode == "version" and index == 1:
    hosts.version = lambda package: "9.9" if package == "jax" else "1"
if mode == "devices" and index == 1:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"


def talk(exchange) -> None:
    """What the tests of `exchange` claim, on several channels at once."""
    import threading

    def repeat(channel: str) -> None:
        for call in range(20):
            values = exchange.gather(f"{channel} {call} {exchange.index}".encode() * exchange.index, channel=channel)
            expected = [f"{channel} {call} {one}".encode() * one for one in range(exchange.count)]
            if values != expected:
                os._exit(9)

    threads = [threading.Thread(target=repeat, args=(channel,)) for channel in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("max", exchange.agree_max([exchange.index, -exchange.index, 7]))
    print("large", [len(one) for one in exchange.gather(bytes(6_000_000 + exchange.index))])
    exchange.barrier("end")
    left = exchange._client.key_value_dir_get_bytes("atlas/")
    print("keys", sum(key.count("/") for key, _ in left) and len(left))


try:
    run = RunConfig(coordinator=coordinator, num_processes=count, process_id=index, host_timeout=timeout)
    with hosts.connect(run) as e:
        print("up", flush=True)
        if mode == "talk":
            talk(e)
        if mode == "late" and index != 1:
            e.gather(b"x", timeout=1)
        if mode == "late":
            time.sleep(20)
        if mode == "error" and index == int(os.environ.get("WHO", "1")):
            raise UserError("bad.jsonl, line 3: no question")
        if mode in ("sleep", "error"):
            time.sleep(30)
        print("done", flush=True)
except UserError as error:
    print(f"atlas: {error}", file=sys.stderr)
    sys.exit(2)
