"""What the server runs for each visitor, at each touch of a widget: navigation, the form, and the page."""

import streamlit as st

from planner.dashboard import first_paint, pages, scenario_form

st.set_page_config(page_title="loraplan", page_icon="🧮", layout="wide")
page = st.navigation(
    [
        st.Page(item.show, title=item.title, icon=item.icon, url_path=item.path, default=item.default)
        for item in pages.PAGES
    ]
)
if not (page.url_path == "" and first_paint.show()):
    scenario_form.show()
    page.run()
