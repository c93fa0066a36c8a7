"""Adapters to the libraries that own the model or the training loop, one module a library.

They are imported as `ecomoe.integrations`, never as `integrations`, and each needs its library
only when it is imported itself.
"""
