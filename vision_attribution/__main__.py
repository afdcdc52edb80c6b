"""python -m vision_attribution"""

from __future__ import annotations

from vision_attribution import main

main()
