"""A Hugging Face model folder on disk, read and checked before any weight is touched.

The walk: model_folder.py opens the folder; model_config.py (with rope_config.py) and
generation_defaults.py read its settings through json_file.py and fields.py; quantization.py says
how quantised weights are stored; weight_files.py finds the tensors with safetensors_header.py and
quantized_tensors.py; fingerprint.py names what was found.
"""
