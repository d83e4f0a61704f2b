"""What is measured, and how: tasks for towers and for models that answer in words, each number with its 95 % interval.

sparse-vlm eval --model tiny --teacher local-dir:build/teacher --tasks imagenet,cifar10,flickr8k,cosine,knn,probe --data DATA
"""
