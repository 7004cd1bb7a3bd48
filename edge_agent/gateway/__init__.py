"""The box's inference endpoint: Open Inference Protocol in, the right replica or upstream, the answer out."""
