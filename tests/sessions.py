"""What tests of stages need: a session on eight CPU devices, 2 x 2 x 2 for training, all eight for sampling; two hosts;
a person who fills in forms."""

import csv
import dataclasses
import threading

from alma_jax import start
from alma_jax.llama import sharding
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import Host
from alma_jax.runtime.session import Session
from alma_jax.store.runs import Run


def session_in(directory, config, mesh=None, **processes):
  by_round = start.checked_options(config)
  run, options = Run(directory, **processes), by_round[0]
  host = Host(options.model, options.engine, sharding.make_mesh(), Display(speaks=run.process == 0))
  return Session(run, host, mesh or sharding.make_mesh(2, 2, 2), by_round, config)


def changed(s, **sections):
  """The session with other values in sections of its Options: changed(s, draw=dict(method="random"))."""
  options = s.options
  for name, values in sections.items():
    value = dataclasses.replace(getattr(options, name), **values) if isinstance(values, dict) else values
    options = dataclasses.replace(options, **{name: value})
  return s.at(s.round, options)


def on_two_hosts(directory, config, work, patience=60):
  """Runs `work(session)` on two hosts that share the run directory, as two threads of which one works at a time:
  planted texts and the Options' caches know no threads."""
  turns, meeting, failures = threading.Lock(), threading.Barrier(2), []

  def barrier(_):
    turns.release()
    meeting.wait(patience)
    turns.acquire()

  def host(number):
    with turns:
      try:
        work(session_in(directory, config, process=number, processes=2, barrier=barrier))
      except BaseException as error:
        failures.append(error)
        meeting.abort()

  threads = [threading.Thread(target=host, args=(number,)) for number in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failures


def filled_in(path, value_of):
  """The rows of a form, which is filled in as by a person who sees the columns alone."""
  with open(path, encoding="utf-8-sig", newline="") as file:
    rows = list(csv.DictReader(file))
  for row in rows:
    row[list(row)[-1]] = value_of(row)
  with open(path, "w", encoding="utf-8-sig", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]), delimiter=";")  # as some spreadsheets write it
    writer.writeheader()
    writer.writerows(rows)
  return rows
