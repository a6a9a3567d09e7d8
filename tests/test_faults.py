"""Runs that are killed, stopped, starved or stale: nothing is lost, the same command goes on."""
import csv
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import launch

# A process that has imported the stages once is forked for each run: a second saved each time.
STAGES = ["01_proxy", "02_meta_rater", "03_score", "04_select", "05_train_eval"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(STAGES)


def play(number, flags, said, changes, strike, env):
    """In a child: one stage, which prints into the file `said`. changes: {(stage, name): value};
    strike: (stage, name of a function, at which call, signal, to the whole session)."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(env)
    torch.set_num_threads(1)
    stages = [None, *map(importlib.import_module, STAGES)]
    stages[1].SAVE_EVERY = 0
    for (place, name), value in changes.items():
        setattr(stages[place] if place else torch, name, value)
    if strike:
        place, name, count, what, all_of_it = strike
        holder = stages[place] if place else os
        whole, calls = getattr(holder, name), []

        def struck(*args, **kwargs):
            calls.append(name)
            if len(calls) == count:
                (os.killpg if all_of_it else os.kill)(os.getsid(0) if all_of_it else os.getpid(),
                                                      what)
            return whole(*args, **kwargs)
        setattr(holder, name, struck)
    stages[1].launch(stages[number].main, stages[number].parse_args(flags))


def begin(said, number, flags, changes={}, strike=(), env={}):
    """A stage as a process of its own, in a session of its own."""
    process = SERVER.Process(target=play, args=(number, flags, str(said), changes, strike, env))
    process.start()
    return process


def end(process, said):
    """Its exit code, what was printed, and the processes that it left."""
    process.join(300)
    time.sleep(0.1)
    return process.exitcode, said.read_text(), members(process.pid)


def members(session):
    """Process ids of a session, zombies left out."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,sess=,stat="], capture_output=True, text=True)
    rows = (line.split() for line in listed.stdout.splitlines())
    return [int(pid) for pid, of, state in rows if int(of) == session and state[0] != "Z"]


def attempt(folder, number, flags, **more):
    said = folder.parent / f"{folder.name}.said"
    said.unlink(missing_ok=True)
    return end(begin(said, number, [*flags, "--out", str(folder)], **more), said)
