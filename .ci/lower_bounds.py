"""Print the lower bounds of the dependencies and of the extras named as constraints for pip."""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
for requirements in (project["dependencies"], *extras):
    for requirement in requirements:
        bound = re.match(r"([\w-]+)>=([\w.]+)", requirement)
        if bound is None:
            sys.exit(f"{requirement!r} has no lower bound.")
        print("==".join(bound.groups()))
