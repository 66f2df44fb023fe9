"""The import arrows of docs/design.md, held by reading imports (nothing is imported)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "fastllm", ROOT / "kernels"

# From the ground up; a module may import from its own layer and from those below it.
LAYERS = [
    {"config", "files", "pieces", "kernels", "_C"},
    {"cpu"},
    {"ops"},
    {"model", "data", "optim", "nn", "dist"},
    {"adapters", "objectives", "checkpoint", "generate", "evaluate", "export",
     "monitor", "callbacks", "report", "plan", "process", "doctor", "patching", "importing",
     "tasks", "chat"},
    {"run", "trainer"},
    {"presets", "commands", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
USES_KERNELS = {"ops", "cpu", "optim", "nn"}
FORBIDDEN = {("objectives", "trainer"), ("model", "optim"), ("model", "data"), ("data", "model"),
             ("model", "trainer"), ("model", "adapters"), ("model", "dist"), ("optim", "dist"),
             ("data", "dist"), ("nn", "dist"), ("dist", "model"), ("dist", "data")}
HEAVY = {"transformers", "wandb", "mlflow", "tensorboard", "optuna", "pyarrow", "onnx", "gguf",
         "datasets", "peft", "trl", "liger_kernel"}

FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def name_of(path: Path) -> str:
    """The room a file belongs to: fastllm/model/hf.py -> model, kernels/rope.py -> kernels."""
    relative = path.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, whether at module level) for every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for parent in ast.walk(tree)
              if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
              for node in ast.walk(parent)}
    found = []
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found += [(f"{base}.{alias.name}" if base in ("fastllm", "torch") else base, top)
                      for alias in node.names]
    return found


def rooms(path: Path) -> set[str]:
    """The rooms of fastllm that a file imports."""
    return {module.split(".")[1] for module, _ in imports(path)
            if module.startswith("fastllm.") and module != "fastllm.__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    room = name_of(path)
    if room == "__init__":
        assert not rooms(path)
        return
    assert room in LEVEL, f"{room} has no layer: give it one here and in docs/design.md"
    for target in rooms(path) - {room}:
        assert target in LEVEL, f"{path}: fastllm.{target} has no layer"
        assert LEVEL[target] <= LEVEL[room], f"{path}: {room} must not import {target} above it"
        assert (room, target) not in FORBIDDEN, f"{path}: {room} must not import {target}"
        assert target not in ("tests", "bench"), f"{path}: the package must not import {target}"
        if target == "kernels":
            assert room in USES_KERNELS, f"{path}: only {USES_KERNELS} may import fastllm.kernels"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_packages(path):
    room = name_of(path)
    for module, top in imports(path):
        root = module.split(".")[0]
        assert root != "kernels", f"{path}: import fastllm.kernels, never kernels"
        if root == "triton":
            assert path.name in ("_triton.py", "_interpreter.py", "_bounds.py") \
                and room == "kernels", \
                f"{path}: in kernels/ _triton.py and the interpreter's two files import triton"
        if module.startswith("torch.distributed"):
            assert room == "dist", f"{path}: only dist imports torch.distributed"
        if top:
            assert root not in HEAVY, f"{path}: import {root} inside the function that needs it"
        if room == "kernels":
            assert not module.startswith("fastllm.") or module.startswith("fastllm.kernels"), \
                f"{path}: a kernel imports torch, triton and fastllm.kernels only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_environment_is_read_in_config_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    uses = [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            and isinstance(node.value, ast.Name) and node.value.id == "os"]
    allowed = path == PACKAGE / "config.py" or path.name == "_triton.py"
    assert allowed or not uses, f"{path}:{uses}: read the environment in fastllm.config"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_offsets_of_programs_are_64_bit(path):
    """`tl.program_id(...) * stride` overflows int32 on large tensors: it is cast to int64 first."""
    if name_of(path) != "kernels":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                assert not (isinstance(side, ast.Call) and isinstance(side.func, ast.Attribute)
                            and side.func.attr == "program_id"), \
                    f"{path}:{node.lineno}: program_id is multiplied before it is int64"


def test_kernels_package_is_a_docstring():
    body = ast.parse((KERNELS / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


def test_no_pickle_on_any_path():
    importer = PACKAGE / "importing" / "pickled.py"
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        words = ["import pickle", "torch.save(", "yaml.load(", "eval(input"]
        if path == importer:  # what a person runs `import` on, never a load path
            assert text.count("torch.load(") == text.count("weights_only=True"), path
        else:
            words.append("torch.load(")
        for word in words:
            assert word not in text, f"{path}: {word}"


def test_files_keep_their_size():
    for path in [*FILES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "csrc").iterdir()]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path} has {lines} lines: is it one room, or two?"
