"""Quality on one's own model: the same prompts, decoded densely and with tidal settings.

The walk of `tidaldecode eval`: command.py takes the options, tasks.py and prompt_file.py give
prompts, runner.py decodes them, one engine per setting, scoring.py judges the outputs, results.py
keeps every one of them in a file as it comes, report.py sums up and view.py prints.
"""
