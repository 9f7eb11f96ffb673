"""From a model and tasks to a recommendation: which reader, stopper and blocks, with a promise (``adainfer tune``)."""
