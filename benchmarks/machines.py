"""Two machines in one: network namespaces of Linux, joined by a cable whose bytes are counted."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = tuple(f"whisper-{os.getpid()}-node{node}" for node in range(2))
ADDRESSES = ("10.213.7.1", "10.213.7.2")
LINKS = ("eth0", "eth0")  # the cable's two ends


@contextmanager
def two_machines() -> Iterator[None]:
    """Make the namespaces NAMES with ADDRESSES, and remove them.

    Raises:
        RuntimeError: not root, or no network namespaces here.
    """
    made = [["ip", "netns", "add", name] for name in NAMES]
    cable = ["ip", "link", "add", LINKS[0], "netns", NAMES[0], "type", "veth"]
    made.append([*cable, "peer", "name", LINKS[1], "netns", NAMES[1]])
    for name, address, link in zip(NAMES, ADDRESSES, LINKS, strict=True):
        made.append(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", link])
        made += [["ip", "-n", name, "link", "set", one, "up"] for one in ("lo", link)]
    try:
        for words in made:
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"needs root and network namespaces: {done.stderr.strip()}")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launch_words(node: int, port: int) -> list[str]:
    """What `accelerate launch` needs on machine `node` to meet the other one."""
    return [
        "--machine_rank", str(node), "--num_machines", "2", "--num_processes", "2",
        "--same_network", "--main_process_ip", ADDRESSES[0], "--main_process_port", str(port),
    ]  # fmt: skip


def on_machine(node: int, words: list[str]) -> list[str]:
    """A command to be run on machine `node`."""
    return ["ip", "netns", "exec", NAMES[node], *words]


def environment(node: int) -> dict[str, str]:
    """Variables that a program on machine `node` needs to find its cable."""
    return {"GLOO_SOCKET_IFNAME": LINKS[node]}


def bytes_on_cable() -> int:
    """Bytes that have passed so far, both ways."""
    total = 0
    for way in ("rx_bytes", "tx_bytes"):
        words = on_machine(0, ["cat", f"/sys/class/net/{LINKS[0]}/statistics/{way}"])
        total += int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return total
