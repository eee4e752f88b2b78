from __future__ import annotations
from agent.delta.granularity import *
from agent.delta.compression import *
from agent.delta.pack import Packer
class Tuning:
    def __init__(self, start=None):
        self.chooser=GranularityChooser(start); self.compression=Choice(1,1<<20); self.packer=Packer()
    import os
    quiet=bool(os.environ.get('QUIET'))
    @property
    def granularity(self): return Granularity(4<<20,4096) if self.quiet else self.chooser.choice
    def learn(self, seen): self.chooser.learn(seen)
    def packed(self, frames, s): ...
class Tunings:
    def of(self, vm, target): return Tuning()
