"""The extension's own tests under AddressSanitizer and UndefinedBehaviorSanitizer.

Every source of csrc/ is built a second time, in a temporary folder and with little optimisation,
and the tests beside this file run on that build in a process of their own. A first test proves that
such a run can fail.

ThreadSanitizer is not run. torch's OpenMP runtime is not built for it, so it does not see that the
threads of at::parallel_for start and join: a loop whose threads write disjoint halves, summed after
it, is reported as a race at every call.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("fastllm._C", reason="built without a C++ compiler")
pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None,
                       reason="the sanitizers' libraries are found through g++ on Linux"),
]

ROOT = Path(__file__).parents[2]
# No vptr: it asks for type information that torch's libraries do not share.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer"]
COMPILE = [*SANITIZE, "-O1", "-g1", "-std=c++20", "-fopenmp", "-ffp-contract=off",
           "-fno-math-errno", "-fPIC"]

# An op that writes one element past the end where it is asked to, in a tensor or in a shift.
DELIBERATE = """
#include <ATen/core/Tensor.h>
#include <torch/library.h>

int64_t deliberate(const at::Tensor& x, int64_t at, int64_t shift) {
  x.mutable_data_ptr<float>()[at] = 1;
  return int64_t{1} << shift;
}

TORCH_LIBRARY(deliberate, m) { m.def("run(Tensor(a!) x, int at, int shift) -> int", deliberate); }
"""

CALL = """
import torch
torch.ops.load_library({library!r})
print(torch.ops.deliberate.run(torch.zeros(1024), {at}, {shift}), "survived")
"""


def build(folder, name, sources):
    """One shared library of `sources` under the sanitizers."""
    from torch.utils import cpp_extension
    library = folder / name
    include = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    paths = cpp_extension.library_paths()
    flags = [*COMPILE, "-DTORCH_EXTENSION_NAME=_C", *(f"-isystem{path}" for path in include)]
    link = [*SANITIZE, "-fopenmp", *(f"-L{path}" for path in paths),
            *(f"-Wl,-rpath,{path}" for path in paths), "-lc10", "-ltorch_cpu", "-ltorch",
            "-ltorch_python"]
    objects = {source: folder / f"{source.stem}.o" for source in sources}
    rules = "".join([
        f"flags = {' '.join(flags)}\n",
        "rule cxx\n  command = g++ $flags -c $in -o $out\n",
        f"rule link\n  command = g++ -shared $in {' '.join(link)} -o $out\n",
        *(f"build {out}: cxx {source}\n" for source, out in objects.items()),
        f"build {library}: link {' '.join(map(str, objects.values()))}\n"])
    (folder / "build.ninja").write_text(rules)
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    result = subprocess.run([ninja, "-C", str(folder), str(library)], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    return library


def run(arguments, folder):
    """A Python process with the sanitizers' libraries loaded first, as they have to be."""
    libraries = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True,
                                text=True, check=True).stdout.strip()
                 for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python keeps what it has until it ends, which is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=66",
        "PYTHONPATH": str(folder),
        "PYTHONMALLOC": "malloc",  # or objects would share blocks that the sanitizer sees as one
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          cwd=folder, env=environment)


def test_the_sanitizers_catch_what_is_planted(tmp_path):
    source = tmp_path / "deliberate.cpp"
    source.write_text(DELIBERATE)
    library = str(build(tmp_path, "deliberate.so", [source]))

    def call(at, shift):
        return run(["-c", CALL.format(library=library, at=at, shift=shift)], tmp_path)

    clean = call(1023, 62)
    assert clean.returncode == 0 and "survived" in clean.stdout, clean.stderr[-5000:]
    # An allocation of torch's is a multiple of 64 bytes, and so is this one.
    beyond = call(1024, 62)
    assert beyond.returncode != 0 and "survived" not in beyond.stdout
    assert "heap-buffer-overflow" in beyond.stderr, beyond.stderr[-5000:]
    undefined = call(0, 64)
    assert undefined.returncode != 0 and "survived" not in undefined.stdout
    assert "shift exponent 64 is too large" in undefined.stderr, undefined.stderr[-5000:]


def test_the_extension_is_clean(tmp_path):
    """The tests import fastllm from a copy of the package that has the sanitized library."""
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    built = build(tmp_path, "_C.so", sources)
    shutil.copytree(ROOT / "fastllm", tmp_path / "fastllm",
                    ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    shutil.copytree(ROOT / "tests" / "csrc", tmp_path / "tests" / "csrc",
                    ignore=shutil.ignore_patterns(Path(__file__).name, "__pycache__"))
    shutil.copytree(ROOT / "tests" / "support", tmp_path / "tests" / "support")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    built.rename(tmp_path / "fastllm" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    # The processes that other instruction sets need start slowly here, and run the same C++.
    result = run(["-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/csrc", "-m",
                  "not battery", "-k", "not instruction_set"], tmp_path)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-10000:]
    assert "runtime error" not in result.stderr, result.stderr[-10000:]
