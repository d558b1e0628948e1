.PHONY: install test check format docs wheel tiny

install:  ## into the current environment, with what the tests need
	pip install -e '.[test]'

test:
	python -m pytest

wheel:  ## build it, install it, use it from an empty directory
	.ci/wheel python3

check:  ## lint and formatting, with the version that setup.py pins
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

docs:  ## the site, into build/site (install the extra docs)
	python -m mkdocs build

tiny:  ## the whole program on the trained miniature, on a laptop
	python -m dopsd_jax.train --config configs/zimage.py:tiny
