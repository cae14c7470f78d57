"""What a sweep tries and what came of it, without Ray and MLflow."""
