"""`token_logprob`: the public function (`api`), the plain one (`reference`) and the chunked one (`chunked`)."""
