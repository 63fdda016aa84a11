"""A reward server that is started again, on its old address, whenever it dies."""

import os
import threading

from absl import logging

from sage_grpo_jax.rewards import spawn

_POLL_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 30.0


class KeptServer:
    """Owns a spawned server and keeps it alive until closed.

    A client that waits out an outage (within its budget) finds the new server on the same address,
    so that no rollout is lost. A server that keeps dying is started again after growing pauses.

    Attributes:
      address: "127.0.0.1:PORT", constant.
    """

    def __init__(self, backend: str, log_path: str | os.PathLike | None = None) -> None:
        """Starts the first server and waits until it serves.

        Raises:
          RuntimeError: the first one does not come up; with the tail of its log.
        """
        self._backend = backend
        self._log_path = log_path
        self._closing = threading.Event()
        self._server = spawn.spawn_server(backend, log_path=log_path)
        self.address = self._server.address
        self._thread = threading.Thread(target=self._keep, name="reward-keeper", daemon=True)
        self._thread.start()

    def __enter__(self) -> "KeptServer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id of the server that runs now."""
        return self._server.process.pid

    def close(self) -> None:
        """Ends the server; it is not started again."""
        self._closing.set()
        self._thread.join()
        self._server.close()

    def _keep(self) -> None:
        pause = _POLL_SECONDS
        port = int(self.address.rpartition(":")[2])
        while not self._closing.wait(_POLL_SECONDS):
            if self._server.process.poll() is None:
                pause = _POLL_SECONDS
                continue
            logging.warning(
                "the reward server ended with exit code %d; starting it again on port %d",
                self._server.process.returncode,
                port,
            )
            try:
                self._server = spawn.spawn_server(
                    self._backend, port=port, log_path=self._log_path, cancelled=self._closing
                )
            except Exception as error:
                # Also one that has nothing to do with the server (no memory, no disk): whatever
                # it is, it may pass, and nobody else would start the server again.
                if self._closing.is_set():
                    return
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                logging.warning("it did not come up, next try in %.1f s: %s", pause, error)
                self._closing.wait(pause)
