"""The command line: app.py holds the commands, options.py their options, terminal.py their manners.

info.py and demo.py (with demo_text.py and demo_view.py) do the work of the commands so named;
`calibrate` and `eval` live beside what they run, in calibration/ and evaluation/.
"""
