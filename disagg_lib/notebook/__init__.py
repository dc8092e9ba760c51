"""What notebooks show and take: their parameters, forms, pictures, the monitor; and all of them, headless.

Comes in: a notebook's globals, a run folder. Goes out: widgets where somebody sits there, text and pictures where not.
Decides nothing: it shows what the other rooms say.
"""
