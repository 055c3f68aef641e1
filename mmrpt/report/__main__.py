"""Draw the plots of a run folder and write its report.md:  python -m mmrpt.report runs/demo"""

from argparse import ArgumentParser

from mmrpt.report.page import write_report


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m mmrpt.report", description=__doc__.split(":")[0])
    parser.add_argument("run", help="a run folder, such as runs/demo")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
