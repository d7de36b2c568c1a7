"""An experiment while a server runs it: assignments, exposures, guardrails, stages.

    live            the running experiment, as the front end of the server uses it
    conversations   the arms of conversations that have begun        measures     what is computed of an answer's text
    guardrails      whether arms are surely worse than the control, or surely not; counted says on which answers
    adaptive        the epoch of adaptive weights and the arms of units; allocating says what the log's sums ask for
    judges          what judges sampled answers; questions are what models are asked, readouts what probes read,
                    validation how far they agree with people

Only `live` knows the others.
"""
