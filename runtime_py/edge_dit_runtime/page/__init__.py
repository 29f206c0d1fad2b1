"""Pages of one HTML file each, which load nothing and run nothing: what a run is doing.

html       style and frame that all pages of edge-dit share
chart      curves as inline SVG
previews   the pictures that a run painted while it trained
run_page   the page of one run
events     event files for TensorBoard
watch      writes page and events while a run trains
"""
