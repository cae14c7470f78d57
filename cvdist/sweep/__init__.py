"""The search space of a sweep and the results of its trials. Depends neither on Ray nor on MLflow."""
