"""`locret doctor`: is this installation whole? Versions, device, memory, the embedded model's files, a first answer."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import locret
from locret.cli.options import OutputOptions, with_options
from locret.cli.output import emit, say
from locret.errors import ConfigError

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy")
_NEEDED_GIB = 2.0


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str
    advice: str = ""  # what to do, where not ok


@with_options
def doctor(output: OutputOptions) -> None:
    """Check the installation; exit code 1, with advice, if something is broken."""
    checks: list[Check] = []
    for look in (_versions, _device, _memory, _files, _answer):
        try:
            checks.append(look())
        except Exception as error:  # a check that crashes is a finding, not the end of the others
            if output.debug:
                raise
            name = look.__name__.strip("_")
            checks.append(Check(name, False, f"{type(error).__name__}: {error}", _REINSTALL))
        if not output.json:
            _show(checks[-1])
    broken = [check for check in checks if not check.ok]
    if output.json:
        emit({"ok": not broken, "version": locret.__version__, "checks": [asdict(check) for check in checks]})
    elif not broken:
        say(f"locret {locret.__version__} is ready; try: locret demo")
    if broken:
        raise typer.Exit(1)


_REINSTALL = "reinstall: pip install --force-reinstall locret; `locret doctor --debug` shows the whole error"


def _show(check: Check) -> None:
    say(f"{'ok    ' if check.ok else 'BROKEN'}  {check.name:<9} {check.detail}")
    if not check.ok and check.advice:
        say(f"                  -> {check.advice}")


def _versions() -> Check:
    found = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    detail = f"locret {locret.__version__}, Python {platform.python_version()}, {', '.join(found)}"
    new_enough = sys.version_info >= (3, 11)
    return Check("versions", new_enough, detail, "locret needs Python 3.11 or newer")


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found = f"CUDA {torch.version.cuda}: {', '.join(names)}"
        try:
            kernels = dict.fromkeys(_prefill_kernels(torch.device("cuda", index)) for index in range(len(names)))
        except ConfigError as error:
            return Check("device", False, found, str(error))
        return Check("device", True, f"{found}; prefill attention (16 bit, head dim 128): {' / '.join(kernels)}")
    return Check("device", True, f"CPU ({os.cpu_count()} cores, {torch.get_num_threads()} threads); no CUDA device")


def _prefill_kernels(device: torch.device) -> str:
    """`cudnn from 1,024 rows, flash below`."""
    from locret.kernels.choice import kernels_by_rows

    *longer, (_, last) = kernels_by_rows(device, dim=128)
    return ", ".join([*(f"{name} from {rows:,} rows" for rows, name in longer), f"{last} below" if longer else last])


def _memory() -> Check:
    import torch

    if torch.cuda.is_available():
        free, total = (count / 2**30 for count in torch.cuda.mem_get_info())
        where = "GPU memory"
    else:
        free, total = _host_gib()
        where = "memory"
    if not total:
        return Check("memory", True, "not known on this system")
    return Check(
        "memory",
        free >= _NEEDED_GIB,
        f"{free:.1f} of {total:.1f} GiB {where} free",
        f"the demo wants about {_NEEDED_GIB:.0f} GiB; close other programs",
    )


def _host_gib() -> tuple[float, float]:
    """Available and total host memory; zeros where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(lines[name].split()[0]) / 2**20 for name in ("MemAvailable", "MemTotal"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        return 0.0, 0.0


def _files() -> Check:
    """Every file of the embedded model has the SHA-256 that was written when it was trained."""
    from locret.backbone import EMBEDDED

    sums = EMBEDDED / "SHA256SUMS"
    if not sums.is_file():
        return Check("files", False, f"no {sums}", f"the embedded model is not in this installation; {_REINSTALL}")
    bad, count, size = [], 0, 0
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = EMBEDDED / name
        if not path.is_file():
            bad.append(f"{name} is missing")
            continue
        data = path.read_bytes()
        count, size = count + 1, size + len(data)
        if hashlib.sha256(data).hexdigest() != expected:
            bad.append(f"{name} was changed ({len(data)} bytes)")
    detail = "; ".join(bad) if bad else f"embedded model: {count} files, {size / 2**20:.1f} MiB, as they were trained"
    return Check("files", not bad, detail, _REINSTALL)


def _answer() -> Check:
    """The embedded model and its heads load and say something."""
    from locret.cli.session import quiet_transformers

    quiet_transformers()
    llm = locret.load(budget=256, device="cpu")
    stream = llm.stream("The sky is blue today.", max_new_tokens=8)
    for _ in stream:
        pass
    stats = stream.output.stats
    detail = f"embedded model generates: {stats.new_tokens} tokens in {stats.decode_seconds:.2f} s"
    return Check("answer", stats.new_tokens >= 1, detail, _REINSTALL)
