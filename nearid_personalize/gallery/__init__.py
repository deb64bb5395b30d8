"""The gallery: many subjects in a store, and which of them, if any, a picture shows."""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.gallery.gallery import Finding as Finding
    from nearid_personalize.gallery.gallery import Gallery as Gallery
    from nearid_personalize.gallery.gallery import Match as Match
    from nearid_personalize.gallery.open_set import AcceptRule as AcceptRule

_HOME_OF = {
    "AcceptRule": "open_set",
    "Finding": "gallery",
    "Gallery": "gallery",
    "Match": "gallery",
}
__all__ = [*_HOME_OF]
__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)
