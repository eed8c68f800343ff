"""Which arrays are alive at the worst moment of a program written by hand."""

from jaxrl_post.planning import buffers

KIB = 1024


def test_taking_a_part_of_a_tuple_keeps_no_other_part_alive():
    text = """
HloModule parts, is_scheduled=true

ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %both = (f32[1024]{0}, f32[4096]{0}) custom-call(%p), custom_call_target="both"
  %work = f32[3072]{0} custom-call(%p), custom_call_target="work"
  %late = f32[1024]{0} get-tuple-element(%both), index=0
  ROOT %out = f32[1024]{0} custom-call(%late, %work), custom_call_target="end"
}
"""
    assert [one.bytes for one in buffers.at_peak(text)] == [16 * KIB, 4 * KIB]


def test_rows_are_added_to_an_array_in_its_place():
    text = """
HloModule rows, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (into: f32[64,16], rows: s32[8], x: f32[8,16]) -> f32[64,16] {
  %into = f32[64,16]{1,0} parameter(0)
  %rows = s32[8]{0} parameter(1)
  %x = f32[8,16]{1,0} parameter(2)
  ROOT %new = f32[64,16]{1,0} scatter(%into, %rows, %x), update_window_dims={1}, to_apply=%add
}

ENTRY %main (rows: s32[8], x: f32[8,16]) -> f32[] {
  %rows = s32[8]{0} parameter(0)
  %x = f32[8,16]{1,0} parameter(1)
  %zero = f32[] constant(0)
  %table = f32[64,16]{1,0} broadcast(%zero), dimensions={}
  %done = f32[64,16]{1,0} fusion(%table, %rows, %x), kind=kCustom, calls=%scattered
  ROOT %out = f32[] custom-call(%done), custom_call_target="end"
}
"""
    assert [one.bytes for one in buffers.at_peak(text) if one.bytes > 4] == [4 * KIB]
