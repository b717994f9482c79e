"""What every room uses: typed values, errors, files, folders, tables, processes that end."""
