"""A Hugging Face model folder on disk, read and checked before any weight is touched.

The walk: model_folder.py opens the folder; model_config.py (with rope_config.py) and
generation_defaults.py read its settings through json_file.py and fields.py; weight_files.py finds
its tensors with safetensors_header.py; fingerprint.py names what was found.
"""
