# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Loads checkpoint folders and tells what each did: `python watched_loading.py ROOT BASE [probe]`, for test_hostile.py.

Each `ROOT/case KIND NAME/folder` is loaded in every way and saved into again, with memory for little more than that.
Prints a line of JSON for each attempt. With `probe` it does itself what must be seen, one thing after the other.
"""

import json
import os
import pickle
import resource
import socket
import subprocess
import sys

import transformers
from transformers import AutoModelForImageTextToText

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, LlavaMergeProcessor, TokenMerger


NUM_PATHS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}
ROOT, BASE = (os.path.realpath(path) for path in sys.argv[1:3])
IGNORED = ("/dev/", "/proc/", "/sys/", os.path.realpath(os.environ["HF_HOME"]))
folder, seen = "", []  # of the attempt that runs


def outside(path) -> bool:
    path = os.path.realpath(os.fsdecode(path))
    return not path.startswith((folder + os.sep, *IGNORED)) and path != folder


def moves_outside(path) -> bool:
    """A link itself may be replaced; rmtree names what is in a folder that it holds open, without a folder."""
    head = os.path.dirname(os.fsdecode(path))
    return bool(head) and outside(head) and outside(path) and not (head == "/tmp" and ROOT not in str(path))


def watch(event: str, args: tuple):
    if not folder:
        return
    if event == "open" and isinstance(args[0], str | bytes):
        name, flags = os.fsdecode(args[0]), args[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and outside(name):
            seen.append(f"wrote {name}")
        if name.startswith(ROOT) and name.endswith((".bin", ".pt", ".pkl", ".pth")):
            seen.append(f"opened the pickle {name}")
    elif event in NUM_PATHS and any(map(moves_outside, args[: NUM_PATHS[event]])):
        seen.append(f"{event} {args}")
    elif event == "socket.getaddrinfo" or event == "socket.connect" and not isinstance(args[1], str):
        seen.append(f"asked the network for {args}")
        raise OSError("no network here")
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        seen.append(f"ran {args[0]}")
    elif event == "pickle.find_class":
        seen.append(f"unpickled {args}")
    elif event in ("compile", "exec") and str(getattr(args[0], "co_filename", args[-1])).startswith(ROOT):
        seen.append(f"ran code of {args}")


def load():
    return LlavaMergeForConditionalGeneration.from_pretrained(folder)


def attempts(kind: str):
    if kind == "merger":
        yield "TokenMerger", lambda: TokenMerger.from_pretrained(folder)
        yield "load_merger", lambda: model.load_merger(folder)
        yield "merger=", lambda: LlavaMergeForConditionalGeneration.from_pretrained(BASE, merger=folder)
        yield "save_merger", lambda: model.save_merger(folder, projector=True)
        return
    yield "config", lambda: LlavaMergeConfig.from_pretrained(folder)
    yield "model", load
    yield "auto", lambda: AutoModelForImageTextToText.from_pretrained(folder)
    yield "processor", lambda: LlavaMergeProcessor.from_pretrained(folder)
    yield "save", lambda: load().save_pretrained(folder)
    yield "save processor", lambda: processor.save_pretrained(folder)
    yield "save another", lambda: model.save_pretrained(folder)


def probes(kind: str):
    yield "write", lambda: open(os.path.join(ROOT, "written"), "w").close()
    yield "pickle", lambda: pickle.loads(pickle.dumps(os.path.join))
    yield "open", lambda: open(os.path.join(folder, "x.bin"), "rb")
    yield "network", lambda: socket.create_connection(("127.0.0.1", 9))
    yield "name", lambda: socket.getaddrinfo("localhost", 9)
    yield "run", lambda: subprocess.run(["true"])
    yield "code", lambda: exec(compile("1", os.path.join(ROOT, "x.py"), "exec"))
    yield "link", lambda: os.symlink(ROOT, os.path.join(ROOT, "link"))


transformers.logging.set_verbosity_error()
model = LlavaMergeForConditionalGeneration.from_pretrained(BASE)
processor = LlavaMergeProcessor.from_pretrained(BASE)
model.save_pretrained(os.environ["HF_HOME"] + "/warm")  # what a first call imports is no news later
processor.save_pretrained(os.environ["HF_HOME"] + "/warm")
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
sys.addaudithook(watch)
for case in sorted(name for name in os.listdir(ROOT) if name.startswith("case")):
    for attempt, call in (probes if "probe" in sys.argv else attempts)(case.split()[1]):
        seen.clear()
        folder, result = os.path.join(ROOT, case, "folder"), "done"
        try:
            call()
        except (Exception, MemoryError) as error:
            result = f"{type(error).__name__}: {str(error)[:300]}"
        folder = ""
        print(json.dumps({"case": case, "attempt": attempt, "result": result, "seen": seen[:1]}), flush=True)
