"""Which layers should select, and how many positions: found by measuring, kept as a plan.

The walk of `tidaldecode calibrate`: command.py takes the options, data.py writes prompts and cuts
windows out of a text, objective.py measures what a plan loses on them in decode steps, search.py
goes from plan to plan, view.py prints the frontier, and plan_store.py keeps the one that was chosen
where Decoder finds it.
"""
