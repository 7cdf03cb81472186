"""Programs that were compiled once are there for these engines, too."""

from tests.serving.conftest import compiled_once, room_for_programs_of_engines

__all__ = ["compiled_once", "room_for_programs_of_engines"]
