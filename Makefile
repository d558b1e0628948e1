.PHONY: install test check format tiny

install:  ## into the current environment, with what the tests need
	pip install -e '.[test]'

test:
	python -m pytest

check:  ## lint and formatting, as pinned in pyproject.toml
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

tiny:  ## the whole program on a miniature, on a laptop
	python -m dopsd_jax.train --config configs/zimage.py:tiny
