"""Two network namespaces joined by a cable: what two hosts are to a program."""

import os
import shutil
import subprocess
from dataclasses import dataclass

FIRST, SECOND = "10.213.77.1", "10.213.77.2"


@dataclass
class Hosts:
    names: tuple[str, str]
    interfaces: tuple[str, str]

    def inside(self, host: int) -> list[str]:
        """The words before a command that is to run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def cut(self) -> None:
        """Pull the cable out of the second host; the first loses only the carrier."""
        _ip("-n", self.names[1], "link", "set", self.interfaces[1], "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def make() -> Hosts:
    """Raises OSError, saying why, where this is not permitted."""
    if not shutil.which("ip"):
        raise OSError("there is no `ip` here")
    tag = os.getpid() % 100_000
    hosts = Hosts((f"fastllm-a{tag}", f"fastllm-b{tag}"), (f"fla{tag}", f"flb{tag}"))
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        _ip("link", "add", hosts.interfaces[0], "netns", hosts.names[0], "type", "veth",
            "peer", "name", hosts.interfaces[1], "netns", hosts.names[1])
        for name, interface, address in zip(hosts.names, hosts.interfaces, (FIRST, SECOND),
                                            strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            for each in ("lo", interface):
                _ip("-n", name, "link", "set", each, "up")
    except OSError:
        hosts.remove()
        raise
    return hosts


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
