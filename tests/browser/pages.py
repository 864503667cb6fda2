"""What the tests of the page do with it: open it, read a section, use its controls."""

SECTIONS = ("speed", "flops", "frameworks", "knobs", "crossovers", "choose", "method")


def open_page(page, path, address="", section=None):
    """Opens the report at an address such as `#batch=8`, and has it drawn: all of it, or one section."""
    page.goto("about:blank")  # an address that differs in its hash alone would not load the page anew
    page.goto(path.as_uri() + address)
    page.wait_for_selector("html[data-ready]", state="attached")
    draw(page, section)


def draw(page, section=None):
    page.evaluate("id => vitcmp.drawAll(id ? document.getElementById(id) : document)", section)


def drawn(page, section):
    """Returns what a section shows, as markup; Plot numbers its clip paths anew with each drawing."""
    draw(page, section)
    return page.evaluate(
        """id => [...document.querySelectorAll(`#${id} .view`)]
             .map(view => view.innerHTML.replace(/plot-clip-\\d+/g, "plot-clip")).join("\\n")""",
        section,
    )


def control(page, section, name):
    return page.locator(f'#{section} [data-state="{name}"]')


def use(page, section, name, value):
    """Gives a control a value as a reader would."""
    node = control(page, section, name)
    if node.get_attribute("type") == "checkbox":
        at_rest(node).set_checked(value == "1")
    elif node.evaluate("node => node.tagName") == "SELECT":
        node.select_option(value)
    else:
        node.fill(value)


def at_rest(node):
    """Returns a node once it stands still on the screen: a chart drawn above moves it from under an aimed click."""
    node.scroll_into_view_if_needed()
    node.evaluate(
        """async node => {
             let last = null;
             for (let frames = 0, left = 600; frames < 5; left--) {
               if (!left) throw new Error("it never stands still");
               await new Promise(requestAnimationFrame);
               const { x, y } = node.getBoundingClientRect();
               frames = `${x} ${y}` === last ? frames + 1 : 0;
               last = `${x} ${y}`;
             }
           }"""
    )
    return node


def cells(page, selector):
    """Returns the texts of a table's body, row by row."""
    return page.eval_on_selector_all(
        f"{selector} tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def wait_until(page, expression):
    """Waits until an expression holds; `wait_for_function` evaluates text inside the page, which its policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {expression}")
