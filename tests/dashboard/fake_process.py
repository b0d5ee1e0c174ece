"""Stands in for `planner.task_process`: the task's seed says what becomes of it."""

import json
import pickle
import sys
import time


def say(**said):
    print(json.dumps(said), flush=True)


def main():
    count = int.from_bytes(sys.stdin.buffer.read(8), "big")
    task = pickle.loads(sys.stdin.buffer.read(count))
    say(stage="counting", done=1, total=4)
    if task.scenario.seed == 1:
        say(error="trace.jsonl:3: not JSON")
    elif task.scenario.seed == 2:
        time.sleep(60)
    elif task.scenario.seed == 3:
        sys.exit(9)
    else:
        say(answer={"requests": len(task.trace)})


main()
