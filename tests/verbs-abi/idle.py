"""Opens the device and does nothing: how often its other threads woke meanwhile, and the time that they used."""
import os
import threading
import time

from pyverbs.device import Context

SECONDS = 2


def others():
    """Switches and processor time, in ticks, of all threads but this one."""
    switches, ticks = 0, 0
    for task in os.listdir('/proc/self/task'):
        if int(task) == threading.get_native_id():
            continue
        with open(f'/proc/self/task/{task}/status') as status:
            switches += sum(int(line.split()[1]) for line in status if 'ctxt_switches' in line)
        with open(f'/proc/self/task/{task}/stat') as stat:
            fields = stat.read().rsplit(')', 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return switches, ticks


with Context(name='anypage0'):
    # What a device does when it is opened is over when its threads have not run for a while.
    before = others()
    for _ in range(100):
        time.sleep(0.1)
        now = others()
        if now == before:
            break
        before = now
    time.sleep(SECONDS)
    after = others()
    print(f'idle for {SECONDS} s: {after[0] - before[0]} wakes, {after[1] - before[1]} ticks')
