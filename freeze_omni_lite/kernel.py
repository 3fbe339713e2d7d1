"""One notebook in one kernel through papermill, and the ranks that torchrun starts.

A kernel is always this Python (no kernelspec of the user can shadow it), works in the repository root, and dies with
us, together with the worker processes that it started.
"""

import contextlib
import functools
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import errors
from .course import ROOT, RUN_FILE, Notebook, Settings
from .errors import InputError, UserError

SOCKET_PATH_LIMIT = 80  # operating systems cut the path of a local socket at about 100 characters


class NotebookFailed(Exception):
    """A notebook stopped: one sentence naming notebook and cell, and the end of the traceback."""

    def __init__(self, sentence: str, log: str = "") -> None:
        super().__init__(sentence)
        self.log = log


# ---- ranks -----------------------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """This process among those that torchrun started. Rank 0 decides, the others follow, through torchrun's store."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Raises InputError if several ranks were started by something else than torchrun."""
        ranks = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        if ranks.world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise InputError(
                "several ranks are started with torchrun: torchrun --nproc_per_node=2 -m freeze_omni_lite run ..."
            )
        return ranks

    @functools.cached_property
    def store(self) -> Any:
        from torch.distributed import TCPStore

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*address, self.world, is_master=False)

    def agree(self, question: str, decide: Callable[[], str]) -> str:
        """Rank 0's answer, on every rank. Waiting is done in small steps, so that a signal can end it."""
        if self.world == 1:
            return decide()
        key = f"freeze_omni/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{question}"
        if self.rank == 0:
            self.store.set(key, decide())
        while not self.store.check([key]):
            time.sleep(0.1)
        return self.store.get(key).decode()

    def environment(self, notebook: Notebook) -> dict[str, str]:
        """A meeting point of their own for this notebook's kernels: the keys of a used one would be taken for new."""
        if "MASTER_PORT" not in os.environ:
            return {}
        port = self.agree(f"port of {notebook.name}", free_port)
        return {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


# ---- one notebook ----------------------------------------------------------------------------------------------------


def kernel_manager(folder: Path):
    """A manager that starts this Python as the kernel, with its sockets in `folder` if the path is short enough."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="this Python",
            language="python",
        )

    local = hasattr(socket, "AF_UNIX") and len(str(folder)) < SOCKET_PATH_LIMIT
    transport = {"transport": "ipc", "ip": str(folder / "k")} if local else {"transport": "tcp"}
    return OwnKernel(kernel_name="python3", connection_file=str(folder / "kernel.json"), **transport)


def kill_group(manager: Any) -> None:
    """End the kernel and the worker processes that it started: its own process group, and nothing else."""
    group = getattr(manager.provisioner, "pgid", None)
    if group and group != os.getpgid(0):
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


@functools.cache
def register_engine() -> str:
    """Teach papermill to run a notebook on a kernel manager of ours and to tell how far it is. Returns the name."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class Client(PapermillNotebookClient):
        def process_message(self, message, cell, cell_index):
            text = message["content"].get("text") if message["msg_type"] == "stream" else None
            self.tell(cell_index, len(self.nb.cells), text or "")
            return super().process_message(message, cell, cell_index)

        def papermill_execute_cells(self):
            try:
                super().papermill_execute_cells()
            except (KeyboardInterrupt, SystemExit):
                kill_group(self.km)  # at once: the polite way waits for the cell
                # asyncio would report the tasks that this leaves unfinished
                logging.getLogger("asyncio").disabled = True
                raise

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(
            cls, nb_man, kernel_name, *, manager, env, tell, log_output, start_timeout, **_
        ):
            client = Client(
                nb_man, km=manager, startup_timeout=start_timeout, timeout=None, store_widget_state=False
            )
            client.tell = tell
            client.execute(env=env, cwd=str(ROOT), cleanup_kc=True)

    papermill_engines.register("freeze_omni", Engine)
    return "freeze_omni"


def kernel_environment(notebook: Notebook, ranks: Ranks, device: str | None, folder: Path) -> dict[str, str]:
    """This process's environment (thread counts, RANK, ...), and what the notebook and its library ask for."""
    return {
        **os.environ,
        **ranks.environment(notebook),
        "FREEZE_OMNI_SOURCE_HASH": notebook.source_hash,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": str(folder / "ipython"),  # no start-up files, no history of the user's
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **({"FREEZE_OMNI_DEVICE": device} if device else {}),
    }


def execute(
    notebook: Notebook, settings: Settings, ranks: Ranks, device: str | None, tell: Callable
) -> float:
    """Run one notebook and keep the executed copy. Returns seconds; raises NotebookFailed, or UserError from a cell."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    output = settings.folder(notebook) / (
        "notebook.ipynb" if ranks.rank == 0 else f"notebook.rank{ranks.rank}.ipynb"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        (output.parent / RUN_FILE).unlink(missing_ok=True)
    folder, begin = Path(tempfile.mkdtemp(prefix="fo-")), time.perf_counter()
    manager = kernel_manager(folder)
    try:
        papermill.execute_notebook(
            str(notebook.path),
            str(output),
            settings.parameters(notebook),
            engine_name=register_engine(),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=300,
            manager=manager,
            env=kernel_environment(notebook, ranks, device, folder),
            tell=tell,
        )
    except papermill.PapermillExecutionError as error:
        raise failure(notebook, ranks, error, output) from None
    except DeadKernelError:
        raise NotebookFailed(
            f"notebook {notebook.name} stopped: its kernel died, most often for lack of memory."
        ) from None
    finally:
        kill_group(manager)
        shutil.rmtree(folder, ignore_errors=True)
    return time.perf_counter() - begin


def failure(notebook: Notebook, ranks: Ranks, error: Any, output: Path) -> Exception:
    """A failing cell as one sentence: UserError for what a person can mend, else NotebookFailed with the traceback."""
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    # The first arrow points into the cell, later ones into the library.
    arrow = re.search(r"^-+> *\d+ (.*)$", trace, re.MULTILINE)
    line = (arrow[1] if arrow else error.source).strip().split("\n")[0]
    place = f"notebook {notebook.name}, cell {error.exec_count} ({line[:60]})"
    place += f", rank {ranks.rank}" if ranks.world > 1 else ""
    kind = getattr(errors, error.ename, None)
    if isinstance(kind, type) and issubclass(kind, UserError) and kind is not errors.FrozenChanged:
        return kind(f"{place}: {error.evalue}")
    reason = f"{error.ename}: {error.evalue.splitlines()[0]}" if error.evalue else error.ename
    sentence = f"{place} failed with {reason}"
    return NotebookFailed(f"{sentence} (executed so far: {output}).", "\n".join(trace.splitlines()[-15:]))
