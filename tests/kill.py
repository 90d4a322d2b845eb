"""A search that dies at a step of our choosing."""
from nas_nb.search.driver import Plugin

class Killed(Exception): pass

class KillAt(Plugin):
    "Raises at a step of the weights, counted from the beginning of the search"
    def __init__(self, step): self.step = step
    def after_w(self, s):
        if s.step == self.step: raise Killed
