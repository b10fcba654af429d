"""The checks of `espalier doctor`. Each looks at one part of a deployment and reports its finding in one line."""
