"""The checks of `espalier doctor`: each looks at one part of a deployment and says in a line what it found."""
