"""glmjax: GLM-5-class models in JAX."""
