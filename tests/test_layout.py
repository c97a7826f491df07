"""The shape of the repository: packages, links, imports, public names."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import secure_fedprompt

ROOT = Path(__file__).parent.parent
FOLDERS = ("protocol", "clients", "server")


def project() -> dict[str, object]:
    content: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return content


def test_package_list_is_complete() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])  # type: ignore[index]
    own = [p for p in (ROOT / "secure_fedprompt").iterdir() if not p.is_symlink()]
    found = {"secure_fedprompt"}
    found |= {f"secure_fedprompt.{p.name}" for p in own if (p / "__init__.py").exists()}
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add("secure_fedprompt." + ".".join(init.parent.relative_to(ROOT).parts))
    assert listed == found
    for folder in [*FOLDERS, "secure_fedprompt"]:
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module} is in no package"


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative_and_committed_as_links(folder: str) -> None:
    link = ROOT / "secure_fedprompt" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    listed = subprocess.run(
        ["git", "ls-files", "-s", f"secure_fedprompt/{folder}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert listed.startswith("120000")


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_the_server_imports_no_torch() -> None:
    heavy = ["torch", "torchvision", "open_clip", "tenseal", "opacus"]
    code = (
        "import sys, secure_fedprompt.server.__main__, secure_fedprompt.server.run\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_the_package_imports_nothing_eagerly() -> None:
    code = (
        "import sys; before = set(sys.modules); import secure_fedprompt\n"
        "print([m for m in set(sys.modules) - before if m.startswith('secure_fedprompt.')])"
    )
    assert run_python(code).strip() == "[]"


def test_the_state_machines_know_neither_torch_nor_sockets() -> None:
    code = (
        "import sys, secure_fedprompt.memory, secure_fedprompt.clients.session\n"
        "print([m for m in ('torch', 'zmq') if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_public_names() -> None:
    assert sorted(secure_fedprompt.__all__) == [
        "Backbone", "FedMGP", "FedOTP", "Federation", "History", "Identity", "ImageSet", "Method",
        "MethodSettings", "Part", "Policy", "PromptFL", "Protection", "Roster", "RoundPlan",
        "SecureFedPromptError", "ServerSettings", "Total", "__version__", "run_round", "simulate",
    ]  # fmt: skip
    for name in secure_fedprompt.__all__:
        assert getattr(secure_fedprompt, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = secure_fedprompt.nothing


def test_no_pickle_and_no_torch_load() -> None:
    for folder in [*FOLDERS, "secure_fedprompt", "benchmarks"]:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "import pickle" not in text, path
            assert "torch.load(" not in text, path


def test_only_the_bundled_weights_are_large() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    large = [f for f in listed if f and (ROOT / f).stat().st_size > 1_000_000]
    assert large == ["secure_fedprompt/bundled_clip/open_clip_model.safetensors"]


@pytest.mark.slow
def test_wheel_and_sdist_build_install_and_run_elsewhere(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    assert wheel.stat().st_size < 8_500_000
    for artefact in (wheel, sdist):
        target = tmp_path / artefact.suffix
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target),
             str(artefact)],
            check=True, capture_output=True,
        )  # fmt: skip
        code = (
            "import secure_fedprompt.clients.methods.promptfl, secure_fedprompt as s;"
            "from secure_fedprompt import Backbone; b = Backbone.load('bundled', device='cpu');"
            "print(s.__file__, b.width)"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert str(target) in shown
        assert shown.strip().endswith("128")


def test_the_protocol_touches_no_file_and_no_socket() -> None:
    """But for SEAL, which wants a file to read from: one of memory."""
    may = {"homomorphic.py": {"os"}}
    for path in (ROOT / "protocol").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            alias.name.partition(".")[0]
            for node in ast.walk(tree) if isinstance(node, ast.Import)
            for alias in node.names
        }  # fmt: skip
        names |= {
            (node.module or "").partition(".")[0]
            for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        }  # fmt: skip
        found = names & {
            "os",
            "pathlib",
            "io",
            "shutil",
            "tempfile",
            "sqlite3",
            "socket",
            "zmq",
            "fcntl",
        }
        assert found <= may.get(path.name, set()), path.name
        called = {
            n.func.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert "open" not in called, path.name


@pytest.mark.slow
def test_nothing_is_connected_to_when_modules_are_imported() -> None:
    """Every module of the package, with sockets that refuse."""
    script = (
        "import importlib, pkgutil, socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('a connection: ' + repr(a))\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "import secure_fedprompt\n"
        "count = 0\n"
        "for found in pkgutil.walk_packages(secure_fedprompt.__path__, 'secure_fedprompt.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name); count += 1\n"
        "print(count)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150
