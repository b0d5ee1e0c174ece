"""The capacity-planning dashboard: `streamlit run app.py`. Navigation only; pages are in planner/dashboard."""

import streamlit as st

from planner.dashboard import pages, scenario_form

st.set_page_config(page_title="loraplan", page_icon="🧮", layout="wide")
page = st.navigation(
    [
        st.Page(item.show, title=item.title, icon=item.icon, url_path=item.path, default=item.default)
        for item in pages.PAGES
    ]
)
scenario_form.show()
page.run()
