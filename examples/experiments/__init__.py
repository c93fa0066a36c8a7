"""The E paper's experiments (arXiv:2605.06415, section 3.5), and the questions they leave open.

python -m examples.experiments list
python -m examples.experiments run low-e --scale small --seeds 3 --data path/to/cifar10
python -m examples.experiments report
"""
