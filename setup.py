"""kernels/ installs as fastllm.kernels, and the C++ extension; all else is in pyproject.toml.

Without a compiler the package still installs: the extension is marked optional, the build says
what is missing, and `fastllm-train info` says which backend each op gets because of it.
"""

from pathlib import Path

from setuptools import find_packages, setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
# -ffp-contract=off: a product and a sum round twice on every machine, so the scalar tail of a
# loop and its vector body agree bit for bit. Vector code asks for FMA where it wants it.
FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wall"]


def extension():
    """The extension and its build command, or nothing where torch cannot be imported."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("fastllm: torch is not importable here, so the C++ extension is not built; "
              "install torch first and pass --no-build-isolation")
        return {}

    class Build(BuildExtension):
        """BuildExtension that lets the package install where the compiler is missing or fails."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                print(f"fastllm: the C++ extension was not built ({error}); "
                      "CPU tensors take the slower torch path")

    module = CppExtension("fastllm._C", SOURCES, extra_compile_args={"cxx": FLAGS},
                          extra_link_args=["-fopenmp"])
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    packages=[*find_packages(include=["fastllm", "fastllm.*"]), "fastllm.kernels"],
    package_dir={"fastllm": "fastllm", "fastllm.kernels": "kernels"},
    **extension(),
)
