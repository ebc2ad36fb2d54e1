def write(directory):
  pass


def summary(directory):
  return (directory / "progress.csv").read_text()
