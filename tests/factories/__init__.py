"""What tests are made of: tenants with their keys, files, base models and jobs, each made by one function."""
