"""The transfer process: all bulk bytes, and the tokens that fetch them.

Started by supervisor/transfer_process.py as `python -P -m supervisor.transfers`. The supervisor imports messages.py of
this package and nothing else of it: HTTP, TLS, hashing and huggingface_hub stay out of the control process.
"""
