def draw(run):
    print("figures", run)
