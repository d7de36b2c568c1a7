"""Paired experiments: all arms answer the same prompts with the same random numbers, and are compared prompt by prompt.

    request    what is compared, and how         inputs    what it reads, checked
    answers    what arms wrote                   through_transformers    how they write it without vLLM
    figures    measures of answers, and their differences     votes, ranking    blind pairwise votes, and what follows
    run        all of it, and the folder that it writes

With vLLM, `steer.serving.offline.answers` writes the answers of all arms in one batch.
"""
